-- class_latents(sae, class, rank): the 48 latents that best tell a class by whether they fire on an image, whatever their activation.
-- For how well latents predict a class on held-out images see probes.
CREATE TABLE class_latents AS
WITH classes AS (
    SELECT
        label AS class,
        count(*) AS n_images,
        count(*) / sum(count(*)) OVER () AS share
    FROM images
    WHERE split = 'eval' AND label IS NOT NULL
    GROUP BY label
),

fired AS (
    SELECT
        firings.sae,
        firings.latent,
        images.label AS class,
        count(*)::INTEGER AS n_both,
        sum(count(*)) OVER (PARTITION BY firings.sae, firings.latent) AS n_labelled
    FROM firings
    INNER JOIN images ON images.image = firings.image
    WHERE images.label IS NOT NULL
    GROUP BY firings.sae, firings.latent, images.label
    QUALIFY count(*) >= 2
),

measured AS (
    SELECT
        fired.sae,
        fired.class,
        fired.latent,
        fired.n_both,
        fired.n_both / classes.n_images AS recall,
        fired.n_both / fired.n_labelled AS precision,
        classes.share
    FROM fired
    INNER JOIN classes ON classes.class = fired.class
)

SELECT
    sae,
    class,
    (row_number() OVER best)::INTEGER AS rank,
    latent,
    n_both,
    recall,
    precision,
    precision / share AS lift
FROM measured
WINDOW best AS (PARTITION BY sae, class ORDER BY recall * precision DESC, latent)
QUALIFY row_number() OVER best <= 48
ORDER BY sae, class, rank;
