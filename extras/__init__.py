"""What several scripts share, and what only a flag asks for. Nothing in here imports a script."""
