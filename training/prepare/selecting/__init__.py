"""What `training.prepare.select` is made of: rules, what they measure of a sample, and what they decide over all."""
