"""The OpenAI-compatible HTTP API: `app.py` routes, `requests.py` what may be asked, `worker.py` the one thread that owns the engine."""
