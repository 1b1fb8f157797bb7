"""What an export to transformers ships: written here as any module, copied with its imports made relative."""
