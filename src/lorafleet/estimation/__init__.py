"""What methods will need, worked out from shapes before anything is trained."""
