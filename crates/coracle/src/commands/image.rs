//! Commands about images, and what they share.

pub(crate) mod history;
pub(crate) mod load;
pub(crate) mod ls;
pub(crate) mod pull;
pub(crate) mod rm;
pub(crate) mod tag;

use coracle_docker::image::View;
use coracle_oci::Reference;
use coracle_store::Image;

use super::inspect;
use crate::cli::flags::{Flag, text};
use crate::cli::{Args, Command};

/// `image inspect`.
pub(crate) const INSPECT: Command = Command {
    path: "image inspect",
    aliases: &[],
    operands: "IMAGE [IMAGE...]",
    about: "Print all that is known of images",
    example: "coracle image inspect --format '{{.Os}}/{{.Architecture}}' redis:7",
    flags: &[&[
        text("format", Some('f'), "string", "Print by a Go template, or json"),
        text("platform", None, "string", "Accepted for Docker's sake"),
    ] as &[Flag]],
    anywhere: true,
    args: Args::AtLeast(1),
    run: |context, parsed| inspect::run(context, parsed, inspect::Kind::Image),
};

/// A reference as users write it: `redis:7` for `docker.io/library/redis:7`.
pub(crate) fn familiar(reference: &str) -> String {
    Reference::parse(reference).map_or_else(|_| reference.to_owned(), |r| r.familiar())
}

/// An image's names as users write them.
pub(crate) struct Names {
    pub(crate) tags: Vec<String>,
    pub(crate) digests: Vec<String>,
}

impl Names {
    pub(crate) fn of(image: &Image) -> Self {
        let (digests, tags): (Vec<String>, Vec<String>) =
            image.refs.iter().map(|r| familiar(r)).partition(|r| r.contains('@'));
        let mut all: Vec<String> =
            digests.into_iter().chain(image.repo_digests.iter().map(|r| familiar(r))).collect();
        all.sort();
        all.dedup();
        Self { tags, digests: all }
    }

    pub(crate) fn view<'a>(&'a self, image: &'a Image) -> View<'a> {
        View {
            id: &image.id,
            tags: &self.tags,
            digests: &self.digests,
            size_bytes: image.size_bytes,
            created_ns: image.created_ns,
        }
    }
}
