"""Tables and pages from records. Needs no torch, so that results build and read anywhere."""
