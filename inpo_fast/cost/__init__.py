"""What a run needs and what it takes at least, from shapes; and where its time goes."""
