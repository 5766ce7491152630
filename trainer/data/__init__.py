"""From text to batches: data sets are built (`build`), read (`prefix`), sampled (`dataset`) and batched (`loader`)."""
