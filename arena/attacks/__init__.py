"""The attacks: one file each, found by name; nothing is listed here."""
