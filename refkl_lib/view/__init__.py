"""What is seen: ipywidgets and matplotlib over the rest of the library, with no logic of their own."""
