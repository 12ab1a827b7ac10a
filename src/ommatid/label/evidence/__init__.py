"""Evidence: the images and words from which a latent's labels are made and on which they are tested."""
