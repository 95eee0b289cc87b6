"""Batches of prompts: with a cache, and for models without a usable one."""
