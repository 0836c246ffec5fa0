"""The other libraries, one file each, which import them when they are asked."""
