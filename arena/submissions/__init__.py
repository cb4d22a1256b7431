"""Methods of strangers: checked, run on a board, written on a card, verified, entered."""
