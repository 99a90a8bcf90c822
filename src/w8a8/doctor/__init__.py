"""What this machine has, what each command makes of it, and what to install to be faster."""
