//! What a tar becomes in the store: the rules of layers, the limits, the image as reader, tools and kernel see it.

#[cfg(test)]
mod kernel;
#[cfg(test)]
mod limits;
#[cfg(test)]
mod maker;
#[cfg(test)]
mod rules;
