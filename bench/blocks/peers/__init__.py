"""The other libraries, one file each."""
