"""What personalisation gives: models adapted to their devices, judged by what these will see next."""
