"""Who does the work of an attack: this process or several, and the record that survives a kill."""
