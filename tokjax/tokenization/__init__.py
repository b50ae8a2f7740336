"""Models whose tokens are made of characters or bytes within the model.

`hat` reads and spells words around a backbone, `toucan` decodes learned groups of characters.
"""
