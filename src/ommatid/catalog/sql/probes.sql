-- probes(sae, class, probe, k): how well k latents, or the activations themselves, distinguish a class from the rest on held-out images.
CREATE TABLE probes AS
SELECT *
FROM read_parquet($probes)
ORDER BY sae, class, probe, k;
