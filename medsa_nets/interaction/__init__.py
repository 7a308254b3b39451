"""Interaction: sessions of a user who corrects masks, what becomes of the clicks, and users that are simulated."""
