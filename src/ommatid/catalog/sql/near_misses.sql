-- near_misses(sae, latent, rank): up to 8 evaluation images on which a latent does not fire but comes nearest to firing.
CREATE TABLE near_misses AS
SELECT *
FROM read_parquet($near_misses)
ORDER BY sae, latent, rank;
