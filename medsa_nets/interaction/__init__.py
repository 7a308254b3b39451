"""Interaction: users who click, and what becomes of their clicks."""
