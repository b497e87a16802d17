"""Ops of converted sites, one folder per meaning; import the folders, this file stays inert.

With the repository root on sys.path this folder shadows the `kernels` package of Hugging Face, and
transformers then imports it to ask its version: nothing may be registered or raised here.
"""
