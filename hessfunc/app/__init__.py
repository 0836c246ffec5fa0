"""The command line, reports and example problems, which use the library and are not used by it."""
