-- previews(sae, latent): the numbers of the images on which a latent fires most strongly, in one list, for pages with many latents.
CREATE TABLE previews AS
SELECT
    sae,
    latent,
    list(image ORDER BY decile DESC, rank)[:8] AS images
FROM examples
GROUP BY sae, latent
ORDER BY sae, latent;

-- without it, looking up the latents of a page reads the lists of thousands
CREATE INDEX previews_by_latent ON previews (latent);
