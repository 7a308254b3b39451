"""A session server: the interactive session behind HTTP, in the protocol that clients of nnInteractive speak."""
