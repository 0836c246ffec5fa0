"""Other libraries' methods, one file each; imports are of the libraries, not of the files."""
