"""What vectors are multiplied with: the Hessian and its relatives, and cures for derivatives that torch gets wrong."""
