-- labels(sae, latent, labeller): what a labeller made of a latent; status says why there is no label.
CREATE TABLE labels AS
SELECT *
FROM read_parquet($labels)
ORDER BY sae, latent, place, labeller;
