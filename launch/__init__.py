"""One command line for every machine: `python -m launch HOW CONFIG WORKDIR`; see docs/launching.md.

What is submitted is rendered, shown, and handed to the tool that people use for such machines (gcloud, kubectl,
sbatch, sky). Nothing here imports avmae_jax: a laptop that submits needs PyYAML alone.
"""
