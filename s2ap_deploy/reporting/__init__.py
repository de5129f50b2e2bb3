"""Objects to text: tables, JSON, Markdown. No torch."""
