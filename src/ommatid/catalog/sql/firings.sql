-- firings(sae, image, latent): a latent that fires on an image of the evaluation split.
-- Rows are sorted by latent, so that the firings of one latent are stored together; a query by image scans one column.
CREATE TABLE firings AS
SELECT *
FROM read_parquet($firings)
ORDER BY sae, latent, image;
