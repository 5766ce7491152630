"""Text to tokens to batches: prefixes are built (`build`), read (`prefix`), sampled (`dataset`), batched (`loader`)."""
