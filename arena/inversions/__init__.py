"""One file per trigger family; the file's name is the family's name. Nothing is listed here."""
