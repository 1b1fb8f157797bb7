from embedcache.registry import require

for _package in ("fastapi", "uvicorn"):
    require(_package, extra="serve")  # which all that is here imports: without it, the error says how to install it
