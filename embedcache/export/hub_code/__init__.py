"""Code that an export to transformers copies into the model folder, with imports made relative.

It runs there without embedcache: its modules, and those of this package that they import, may otherwise import only
PIL, NumPy, torch, transformers and the standard library. timm, where a model needs it, is imported by name.
"""
