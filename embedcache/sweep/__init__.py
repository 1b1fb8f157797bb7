from embedcache.registry import require

require("optuna", extra="sweep")  # which all that is here imports: without it, the error says how to install it
