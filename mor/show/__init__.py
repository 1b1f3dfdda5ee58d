"""What the user sees: token depths in the terminal, figures, and the report page."""
