"""What training means, once per task: the batch, the loss, the metrics, the pictures."""
