"""The cache's questions, one object each: bytes (`arena`), whose rows (`tables`), a model's view (`step`), who gets pages (`policy`)."""
