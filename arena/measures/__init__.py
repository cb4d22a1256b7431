"""One file per measure; the file's name is the measure's name. Nothing is listed here."""
