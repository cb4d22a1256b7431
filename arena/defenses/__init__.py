"""One file per defense; the file's name is the defense's name. Nothing is listed here."""
