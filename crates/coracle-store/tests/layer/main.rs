//! What a tar becomes in the store: the rules of layers, the limits, the image as reader, tools and kernel see it.

mod kernel;
mod limits;
mod maker;
mod rules;
