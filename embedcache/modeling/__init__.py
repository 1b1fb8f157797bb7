"""Code that runs in an exported model, without embedcache.

transformers copies these files into the folder of a model. They import each other relatively, and otherwise only NumPy,
PIL, torch, transformers and the standard library. timm, if a model needs it, is imported by name.
"""
