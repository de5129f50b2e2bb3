"""Objects to text: tables, JSON, Markdown."""
