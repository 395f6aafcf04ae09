"""Small projects outside the package that use it: lessons, and a project to copy."""
