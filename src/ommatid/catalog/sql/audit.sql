-- audit(sae, latent, class): whether the model leans on a latent, when it answers with a class, more than the images justify.
-- Pairs with fewer than 10 images of the class or not, with the latent or not, have no row; audits says how many, and why an SAE has none.
CREATE TABLE audit AS
SELECT *
FROM read_parquet($audit)
ORDER BY sae, latent, class;
