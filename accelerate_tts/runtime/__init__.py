"""What happens at each call of a synthesis function."""
