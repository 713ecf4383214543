"""What others load: a trained model in a folder or file of a format of theirs, with all that belongs to it."""
