-- meanings(sae, latent): the mean evaluation image on which a latent fires, in the joint image-text space, for search by words.
-- A latent that never fires has no row, and activations without joint embeddings give no rows at all.
CREATE TABLE meanings AS
SELECT *
FROM read_parquet($meanings)
ORDER BY sae, latent;
