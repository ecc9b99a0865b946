"""Speed by depth of context: what is measured, on which engines, against which limits."""
